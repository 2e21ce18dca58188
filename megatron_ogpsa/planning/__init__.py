"""What a run would look like on a cluster that is not there: layouts, ranks without memory, costs."""
