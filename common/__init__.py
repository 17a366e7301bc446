"""The core that the four systems share; imports inside it point one way (see the README's tree)."""
