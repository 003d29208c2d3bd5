"""The engine: replays a method over chunks of checkpoints, in bounded memory, with exact statistics."""
