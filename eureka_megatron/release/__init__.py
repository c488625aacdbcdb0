"""What is given away: Hugging Face directories with a model card, FP8 for vLLM, uploads."""
