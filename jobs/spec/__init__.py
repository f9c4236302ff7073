"""Job specs: the schema, the YAML loader and the dispatcher."""
