"""What comes from users and goes to them: pictures, model hubs, overlays."""
