"""CPU backend in C++: compiled on the machine, from one file and torch's headers."""
