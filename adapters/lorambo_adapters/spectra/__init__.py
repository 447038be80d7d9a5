"""Sources of spectra. Import the module of the source you use, such as `spectra.weights`."""
