"""From ranks to the tools: their configurations, smaller LoRAs, and ranks of live models."""
