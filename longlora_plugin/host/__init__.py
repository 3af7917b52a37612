"""Axolotl: what differs between its versions, and its schema."""
