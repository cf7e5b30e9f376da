"""Where texts and weights come from: the Hub, a local folder, a Python package, or text that every Python carries."""
