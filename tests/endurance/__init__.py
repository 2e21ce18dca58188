"""Whether long runs stay as they are: 2,000 steps with refreshes, and the memory and open files of each rank meanwhile."""
