"""The plugins that ship; each is found and applied like any other."""
