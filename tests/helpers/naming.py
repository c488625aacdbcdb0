"""How transformers 5 spells the names of tensors."""


def newer_name(hub: str) -> str:
    """Example: newer_name("model.norm.weight") == "model.language_model.norm.weight"."""
    if hub.startswith("visual."):
        return f"model.{hub}"
    return hub.replace("model.", "model.language_model.", 1) if hub.startswith("model.") else hub
