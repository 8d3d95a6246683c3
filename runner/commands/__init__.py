"""The commands of `runner`: each module has the flags, the help and the call of one."""
