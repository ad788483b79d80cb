// Which steps of which tiles a block of the grid takes; `Shares` of kernels/marlin_many.py says the same in Python.
//
// A block takes `waves` tiles whole. The tiles that are left are one row of steps, which blocks share equally: a share
// may begin within a tile and end within another, or within the same.
struct Piece {
  int tile, begin, end;
};

struct Shares {
  int blocks, waves, tiles, steps;

  // Where the share of a block begins, in steps from that of the first tile left. The product fits: Python sees to it.
  __device__ __forceinline__ int first(int block) const {
    const int left = tiles - waves * blocks;
    return left > 0 ? int(u32(block) * u32(left) * u32(steps) / u32(blocks)) : 0;
  }
};

struct Walk {
  Shares shares;
  int block, wave, at, end;

  __device__ __forceinline__ Walk(const Shares& of, int own)
      : shares(of), block(own), wave(0), at(of.first(own)), end(of.first(own + 1)) {}

  // The next piece of the block's work, if there is one.
  __device__ __forceinline__ bool next(Piece& piece) {
    while (wave < shares.waves) {
      const int tile = wave++ * shares.blocks + block;
      if (tile < shares.tiles) {
        piece = {tile, 0, shares.steps};
        return true;
      }
    }
    if (at >= end) return false;
    const int tile = at / shares.steps, begin = at - tile * shares.steps;
    piece = {shares.waves * shares.blocks + tile, begin, min(shares.steps, begin + end - at)};
    at += piece.end - begin;
    return true;
  }
};
