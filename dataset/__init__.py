"""Text to train on goes in here, beside the scripts that write a sample and download public data."""
