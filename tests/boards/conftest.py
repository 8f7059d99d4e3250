from support.boards import arm64, armhf, board

__all__ = ["arm64", "armhf", "board"]
