"""Jobs that train several models and merge or compare them."""
