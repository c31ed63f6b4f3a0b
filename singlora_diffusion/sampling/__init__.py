"""Images made with an adapter, and what is written beside them."""
