"""Tools that made data of this repository; nothing else needs them."""
