"""Workers: processes that serve devices, and the zygote they are forked from."""
