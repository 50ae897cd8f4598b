"""`dovetail tune` and `dovetail db`: what is measured, kept and believed."""
