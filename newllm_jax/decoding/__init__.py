"""How text is made from logits; knows no model."""
