"""Tools that made data in this repository; nothing else needs them."""
