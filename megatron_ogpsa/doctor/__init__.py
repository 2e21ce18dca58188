"""What can be known of a run before it is started: the machine, the configuration, the data, the ranks' connections."""
