// The body of the CUDA kernel of segment replacement: what each thread of each block does to tiles.
#pragma once

#include "segment_replace.h"

namespace syncdpo {

constexpr int kChunksPerThread = 8;
constexpr uint32_t kAllDone = (1u << kChunksPerThread) - 1;

// At most a chunk, element by element: seams, tails, and layouts without longer runs.
struct CopyElements {
  int64_t size;
  template <class T>
  static SYNCDPO_FN void each(char* to, const char* from, int64_t bytes) {
    SYNCDPO_ROLLED
    for (int64_t p = 0; p < bytes; p += sizeof(T)) write<T>(to + p, read<T>(from + p));
  }
  SYNCDPO_FN void operator()(char* to, const char* from, int64_t bytes) const {
    if (size == 1)
      each<uint8_t>(to, from, bytes);
    else if (size == 2)
      each<uint16_t>(to, from, bytes);
    else
      each<uint32_t>(to, from, bytes);
  }
};

// Where a chunk begins within its run; before 0 where the run begins within the chunk.
SYNCDPO_FN int64_t chunk_begin(const Run& run, int64_t chunk) {
  return chunk * 16 - static_cast<int64_t>(reinterpret_cast<uintptr_t>(run.out) & 15);
}

// Loads this thread's whole chunks from `first` to `last`, `shift` bytes on, and returns their set.
template <int threads, bool aligned>
SYNCDPO_FN uint32_t load_chunks(const Stream& stream, const Run& run, const char* from,
                                int64_t moved, int64_t first, int64_t last, Chunk* value) {
  uint32_t loaded = 0;
  SYNCDPO_UNROLL
  for (int i = 0; i < kChunksPerThread; ++i) {
    const int64_t chunk = first + i * threads, begin = chunk_begin(run, chunk);
    bool whole = chunk <= last && begin >= 0 && begin + 16 <= stream.run;
    if (!aligned) {  // the two chunks that the source lies in must be part of the donor's run
      const int64_t low = begin + moved - 15, high = begin + moved + 31;
      whole = whole && low >= 0 && high <= stream.run;
    }
    if (!whole) continue;
    value[i] = aligned ? read<Chunk>(from + begin) : read_chunk(from + begin);
    loaded |= 1u << i;
  }
  return loaded;
}

// A tile within one piece of one run, the common case: 16 bytes at a time. Returns the set of this
// thread's chunks that are done; left are those that a run begins or ends in, and those whose
// source has no room around it for aligned reads.
template <int threads>
SYNCDPO_FN uint32_t copy_tile(const Stream& stream, const Run& run, const Piece& piece,
                              int64_t first, int64_t last, int thread) {
  const char* from = donor_run(stream, run, piece.donor, piece.shift);
  const int64_t moved = stream.time_dim < 0 ? piece.shift * stream.in_frame : 0;
  const bool aligned =
      ((reinterpret_cast<uintptr_t>(from) ^ reinterpret_cast<uintptr_t>(run.out)) & 15) == 0;
  first += thread;
  Chunk value[kChunksPerThread];
  const uint32_t done =
      aligned ? load_chunks<threads, true>(stream, run, from, moved, first, last, value)
              : load_chunks<threads, false>(stream, run, from, moved, first, last, value);
  SYNCDPO_UNROLL
  for (int i = 0; i < kChunksPerThread; ++i)
    if (done >> i & 1) write<Chunk>(run.out + chunk_begin(run, first + i * threads), value[i]);
  return done;
}

// As above where the tile from chunk `first` to `last` allows it; else none of it is done.
template <int threads>
SYNCDPO_FN uint32_t try_copy_tile(const Stream& stream, const Segments& segments, int64_t first,
                                  int64_t last, int thread, Pass pass) {
  const int64_t index = first / stream.chunks_per_run;
  if (last / stream.chunks_per_run != index) return 0;
  const Run run = find_run(stream, index);
  const int64_t origin = index * stream.chunks_per_run;
  const int64_t begin = larger<int64_t>(chunk_begin(run, first - origin), 0);
  const int64_t end = smaller<int64_t>(chunk_begin(run, last - origin + 1), stream.run);
  if (begin >= end) return 0;
  const int64_t row = begin / stream.frame;
  const int64_t t = stream.time_dim < 0 ? row % stream.frames : run.t;
  const int64_t until = t + (end - 1) / stream.frame - row + 1;
  const Piece piece = find_piece(stream, segments, run.sample, t);
  if (piece.kind == Kind::blend || until > piece.until) return 0;
  if (pass != Pass::out_of_place) {
    if (piece.kind == Kind::keep) return kAllDone;
    if (reads_overwritten(stream, segments, run.sample, t, until)) return 0;
    if (pass == Pass::stage) return kAllDone;
  }
  return copy_tile<threads>(stream, run, piece, first - origin, last - origin, thread);
}

// What one of a tile's threads does: its chunks are `threads` apart.
template <int threads>
SYNCDPO_FN void replace_tile(const Stream& stream, const Segments& segments, int64_t tile,
                             int thread, Pass pass) {
  const int64_t total = stream.samples * stream.runs_per_sample * stream.chunks_per_run;
  const int64_t first = tile * threads * kChunksPerThread;
  const int64_t last = smaller(first + threads * kChunksPerThread, total) - 1;
  const uint32_t done = try_copy_tile<threads>(stream, segments, first, last, thread, pass);
  if (done == kAllDone) return;
  const CopyElements copy{item_size(stream.dtype)};
  SYNCDPO_ROLLED
  for (int i = 0; i < kChunksPerThread; ++i) {
    const int64_t chunk = first + thread + i * threads;
    if (done >> i & 1 || chunk > last) continue;
    const Run run = find_run(stream, chunk / stream.chunks_per_run);
    const int64_t begin = chunk_begin(run, chunk % stream.chunks_per_run);
    replace_range(stream, segments, run, larger<int64_t>(begin, 0),
                  smaller<int64_t>(begin + 16, stream.run), pass, copy);
  }
}

// At most two streams, one tile after the other.
struct Launch {
  Stream stream[2];
  int64_t tiles[2];
  Segments segments;
};

template <int threads>
Launch make_launch(const std::vector<Stream>& streams, const Segments& segments) {
  constexpr int64_t kTile = threads * kChunksPerThread;
  Launch launch{};
  launch.segments = segments;
  for (size_t i = 0; i < streams.size(); ++i) {
    const Stream& stream = launch.stream[i] = streams[i];
    const int64_t chunks = stream.samples * stream.runs_per_sample * stream.chunks_per_run;
    launch.tiles[i] = (chunks + kTile - 1) / kTile;
  }
  return launch;
}

// A tile of the launch, first those of the one stream, then those of the other.
template <int threads>
SYNCDPO_FN void replace_tile(const Launch& launch, int64_t tile, int thread, Pass pass) {
  const int which = tile >= launch.tiles[0];
  const Stream& stream = launch.stream[which];
  if (which) tile -= launch.tiles[0];
  replace_tile<threads>(stream, launch.segments, tile, thread, pass);
}

// Where a stream is replaced in place: what a thread of block `block` of `blocks` does in a pass.
template <int threads>
SYNCDPO_FN void replace_tiles(const Launch& launch, int64_t block, int64_t blocks, int thread,
                              Pass pass) {
  for (int64_t tile = block; tile < launch.tiles[0] + launch.tiles[1]; tile += blocks) {
    const bool in_place = launch.stream[tile >= launch.tiles[0]].in_place;
    if (in_place || pass != Pass::stage)
      replace_tile<threads>(launch, tile, thread, in_place ? pass : Pass::out_of_place);
  }
}

}  // namespace syncdpo
