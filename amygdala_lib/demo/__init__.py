"""The bundled model: the world it was taught, how it is trained, and what it can do."""
