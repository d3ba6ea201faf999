"""Where each operator may run split: the rules, what chooses among them, and the check."""
