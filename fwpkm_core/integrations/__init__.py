"""What makes the memory a part of libraries around it; each is imported only when asked for."""
