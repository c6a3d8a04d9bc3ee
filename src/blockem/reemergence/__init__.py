"""What a fine-tune does around a blocked set, and when misalignment comes back."""
