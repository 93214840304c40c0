"""What several tests share: comparing weights and starting real ranks."""
