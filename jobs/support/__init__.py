"""How every command starts and ends, and the options several of them share."""
