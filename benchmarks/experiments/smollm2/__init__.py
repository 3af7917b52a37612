"""`make smollm2`: a real pretrained model to 16k tokens."""
