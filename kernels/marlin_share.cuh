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

  // The next block after `block`, which has steps of `tile` too, that has some, or 0 if there is none.
  __device__ __forceinline__ int after(int block, int tile) const {
    const int end = (tile - waves * blocks + 1) * steps;
    do ++block;
    while (block < blocks && first(block) < end && first(block) == first(block + 1));
    return block < blocks && first(block) < end ? block : 0;
  }
};

struct Walk {
  Shares shares;
  int block, at, end;
  int whole, pieces;  // of the latter, so many are whole tiles

  __device__ __forceinline__ Walk(const Shares& of, int own)
      : shares(of), block(own), at(of.first(own)), end(of.first(own + 1)) {
    whole = max(0, min(of.waves, (of.tiles - own + of.blocks - 1) / of.blocks));
    pieces = whole + (end > at ? (end - 1) / of.steps - at / of.steps + 1 : 0);
  }

  // The `i`-th piece of the block's work.
  __device__ __forceinline__ Piece piece(int i) const {
    if (i < whole) return {i * shares.blocks + block, 0, shares.steps};
    const int tile = at / shares.steps + i - whole, first = tile * shares.steps;
    return {shares.waves * shares.blocks + tile, max(at - first, 0), min(end - first, shares.steps)};
  }
};
