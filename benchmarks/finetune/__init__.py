"""Does choosing ranks help a fine-tuning? Real models and text, at exactly equal budgets.

The command line is `python -m benchmarks.finetune`.
"""
