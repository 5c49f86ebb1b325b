"""`star-edge serve`: an OpenAI-compatible server for a StarChatHandler, with safe limits, metrics and a page."""
