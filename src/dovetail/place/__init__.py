"""`dovetail place`: experts over devices, from loads to files that serving systems read."""
