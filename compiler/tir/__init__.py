"""The tensor IR: loops, blocks and scalar expressions."""
