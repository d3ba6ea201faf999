"""What is in a program, in numbers, tables and text."""
