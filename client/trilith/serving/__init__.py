"""What serving takes from training, and who asks it: export folders, debugging info, predictions."""
