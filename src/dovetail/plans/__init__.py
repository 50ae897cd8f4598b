"""What people do with plan files: make, show, check, explain, report and draw them."""
