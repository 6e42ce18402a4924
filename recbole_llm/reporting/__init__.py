"""What a trained model is worth: measured against baselines, in words, in pictures and as one HTML file."""
