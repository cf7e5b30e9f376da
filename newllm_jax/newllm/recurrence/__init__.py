"""The recurrence of New-LLM over a text: one definition, and faster forms of it."""
