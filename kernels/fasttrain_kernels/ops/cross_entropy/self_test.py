"""Small fixed problems on which a backend of cross_entropy is compared with exact values."""
