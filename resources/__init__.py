"""The Resource classes that ship."""
