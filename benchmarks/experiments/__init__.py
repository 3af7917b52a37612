"""Programs around the commands of the plugin, one folder for each `make` target."""
