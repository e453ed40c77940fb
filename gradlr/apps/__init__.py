"""Tools beside the library, which imports none of them."""
