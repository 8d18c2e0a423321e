// Forward and backward passes of quantizers over some of the networks (slots) that share a tensor;
// called by `_native.py`.
//
// A slot's values lie in rows: a sample of its inputs, or an output channel of its weights. Work is
// cut into chunks of about a block, each of one slot, so that sums do not depend on the number of
// threads.

#include "blocks.hpp"
#include "intervals.hpp"

namespace {

// Where the slots lie: numbers in the order of `_native.Places`.
struct Places {
    long rows, columns, row_stride, slot_stride, n_slots;
    const int64_t* slots;

    explicit Places(const int64_t* numbers)
        : rows(numbers[0]), columns(numbers[1]), row_stride(numbers[2]), slot_stride(numbers[3]),
          n_slots(numbers[4]), slots(numbers + 5) {}

    long pieces_in_row() const { return (columns + BLOCK - 1) / BLOCK; }
    long pieces() const { return rows * pieces_in_row(); }
    long pieces_in_chunk() const { return columns < BLOCK ? BLOCK / columns : 1; }
    long chunks() const { return (pieces() + pieces_in_chunk() - 1) / pieces_in_chunk(); }
};

// Values of one row: at most a block.
struct Piece {
    long row, offset, size, at;

    Piece(const Places& places, long j, long p)
        : row(p / places.pieces_in_row()), offset(p % places.pieces_in_row() * BLOCK),
          size(places.columns - offset < BLOCK ? places.columns - offset : BLOCK),
          at(row * places.row_stride + places.slots[j] * places.slot_stride + offset) {}
};

// Call `work(chunk, j, first, last)` for pieces `first` up to `last` of the j-th slot.
template <class Work>
void for_chunks(const Places& places, long threads, const Work work) {
    const long in_slot = places.chunks(), per_chunk = places.pieces_in_chunk();
    const long n_pieces = places.pieces();
    if (places.n_slots * places.rows * places.columns < VALUES_WORTH_THREADS) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (long chunk = 0; chunk < places.n_slots * in_slot; ++chunk) {
        const long first = chunk % in_slot * per_chunk, last = first + per_chunk;
        work(chunk, chunk / in_slot, first, last < n_pieces ? last : n_pieces);
    }
}

// Call `work(j, p, piece)` for all pieces.
template <class Work>
void for_pieces(const Places& places, long threads, const Work work) {
    for_chunks(places, threads, [&](long, long j, long first, long last) {
        for (long p = first; p < last; ++p) work(j, p, Piece(places, j, p));
    });
}

// Steps or thresholds: of row n and the j-th slot, one apart or one that the slot's rows share.
struct Steps {
    const float* raw;
    long by_row, by_slot;
    float smallest;

    long index(long j, long row) const { return row * by_row + j * by_slot; }
    float at(long j, long row) const { return positive(raw[index(j, row)], smallest); }

    // Sum the pieces' parts to gradients of the raw steps, times a scale of each slot.
    template <class Scale>
    void sum(const std::vector<float>& parts, const Places& places, const Scale scale,
             float* gradients) const {
        const long in_row = places.pieces_in_row();
        for (long j = 0; j < places.n_slots; ++j) {
            double sum = 0.0;
            for (long row = 0; row < places.rows; ++row) {
                for (long i = 0; i < in_row; ++i) sum += parts[(j * places.rows + row) * in_row + i];
                if (by_row == 0 && row + 1 < places.rows) continue;
                const long own = index(j, row);
                gradients[own] = static_cast<float>(sum) * (raw[own] < 0.0f ? -scale(j) : scale(j));
                sum = 0.0;
            }
        }
    }
};

// Of sorted tables of different lengths, with `room` for each.
std::vector<Levels> levels_of_slots(const float* levels, const int64_t* counts, long room,
                                    long n_slots) {
    std::vector<Levels> found;
    for (long j = 0; j < n_slots; ++j) found.emplace_back(levels + j * room, counts[j]);
    return found;
}

}  // namespace

// What Python calls. Values, upstream gradients, outputs and gradients to values are float32, or
// bfloat16 where `half`; all else is float32. `places`: see `Places`; the other slots of the tensors
// are left alone. A step of row n and the j-th slot lies at n * by_row + j * by_slot.

extern "C" void copy(long half, const void* values, const int64_t* numbers, void* out,
                     long threads) {
    const Places places(numbers);
    typed(half, [=](auto kind) {
        using T = decltype(kind);
        const T* v = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        for_pieces(places, threads, [=](long, long, const Piece& piece) {
            std::memcpy(to + piece.at, v + piece.at, piece.size * sizeof(T));
        });
    });
}

extern "C" void uniform(long half, const void* values, const int64_t* numbers, const float* raw,
                        long by_row, long by_slot, float smallest, const float* qmin,
                        const float* qmax, void* out, long threads) {
    const Places places(numbers);
    const Steps steps = {raw, by_row, by_slot, smallest};
    typed(half, [=](auto kind) {
        using T = decltype(kind);
        const T* v = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        for_pieces(places, threads, [=](long j, long, const Piece& piece) {
            const float s = steps.at(j, piece.row);
            uniform_block(v + piece.at, s, qmin[j], qmax[j], to + piece.at, piece.size);
        });
    });
}

// `n_features`: N of LSQ's gradient scale; 0 leaves the gradients to the steps unscaled.
extern "C" void uniform_backward(long half, const void* values, const int64_t* numbers,
                                 const void* upstream, const float* raw, long by_row, long by_slot,
                                 float smallest, const float* qmin, const float* qmax,
                                 float n_features, void* grad_values, float* grad_raw,
                                 long threads) {
    const Places places(numbers);
    const Steps steps = {raw, by_row, by_slot, smallest};
    std::vector<float> parts(places.n_slots * places.pieces());
    float* part = parts.data();
    typed(half, [=](auto kind) {
        using T = decltype(kind);
        const T *v = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        for_pieces(places, threads, [=](long j, long p, const Piece& piece) {
            const float s = steps.at(j, piece.row);
            part[j * places.pieces() + p] = uniform_slopes(
                v + piece.at, r + piece.at, Grid(s, qmin[j], qmax[j]), to + piece.at, piece.size);
        });
    });
    const auto scale = [=](long j) {
        return n_features > 0.0f ? 1.0f / std::sqrt(qmax[j] * n_features) : 1.0f;
    };
    steps.sum(parts, places, scale, grad_raw);
}

extern "C" void clipped(long half, const void* values, const int64_t* numbers, const float* raw,
                        float smallest, const float* levels, const int64_t* counts, long room,
                        void* out, long threads) {
    const Places places(numbers);
    const Steps steps = {raw, 1, places.rows, smallest};
    const auto tables = levels_of_slots(levels, counts, room, places.n_slots);
    typed(half, [=, &tables](auto kind) {
        using T = decltype(kind);
        const T* v = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        for_pieces(places, threads, [=, &tables](long j, long, const Piece& piece) {
            const float alpha = steps.at(j, piece.row);
            nearest_block(v + piece.at, alpha, tables[j], to + piece.at, piece.size);
        });
    });
}

extern "C" void clipped_backward(long half, const void* values, const int64_t* numbers,
                                 const void* upstream, const float* raw, float smallest,
                                 const float* levels, const int64_t* counts, long room, float scale,
                                 void* grad_values, float* grad_raw, long threads) {
    const Places places(numbers);
    const Steps steps = {raw, 1, places.rows, smallest};
    const auto tables = levels_of_slots(levels, counts, room, places.n_slots);
    std::vector<float> parts(places.n_slots * places.pieces());
    float* part = parts.data();
    typed(half, [=, &tables](auto kind) {
        using T = decltype(kind);
        const T *v = static_cast<const T*>(values), *r = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        for_pieces(places, threads, [=, &tables](long j, long p, const Piece& piece) {
            const float alpha = steps.at(j, piece.row);
            part[j * places.pieces() + p] = nearest_slopes(v + piece.at, r + piece.at, alpha,
                                                           tables[j], to + piece.at, piece.size);
        });
    });
    steps.sum(parts, places, [=](long) { return scale; }, grad_raw);
}

// `sums`: by slot and level, the sum of weights less their level, and how many weights there are;
// # shape: (slots, 2, room)
extern "C" void codebook(long half, const void* weights, const int64_t* numbers,
                         const float* levels, const int64_t* counts, long room, void* out,
                         float* sums, long threads) {
    const Places places(numbers);
    const auto tables = levels_of_slots(levels, counts, room, places.n_slots);
    const long n_sums = 2 * room;
    std::vector<float> parts(n_sums * places.n_slots * places.chunks());
    float* part = parts.data();
    typed(half, [=, &tables](auto kind) {
        using T = decltype(kind);
        const T* w = static_cast<const T*>(weights);
        T* to = static_cast<T*>(out);
        for_chunks(places, threads, [=, &tables](long chunk, long j, long first, long last) {
            const long n = counts[j];
            IntervalSums sums_of_chunk(n);
            for (long p = first; p < last; ++p) {
                const Piece piece(places, j, p);
                codebook_block(w + piece.at, tables[j], to + piece.at, sums_of_chunk, piece.size);
            }
            std::vector<float> found(2 * n);
            sums_of_chunk.total(found.data());
            for (long k = 0; k < n; ++k) {
                part[n_sums * chunk + k] = found[k];
                part[n_sums * chunk + room + k] = found[n + k];
            }
        });
    });
    for (long j = 0; j < places.n_slots; ++j) {
        const auto own = parts.begin() + n_sums * places.chunks() * j;
        total_of({own, own + n_sums * places.chunks()}, n_sums, sums + n_sums * j);
    }
}

// `index`: how many thresholds lie below each value, # shape: (slots, rows, columns)
extern "C" void thresholds(long half, const void* values, const int64_t* numbers,
                           const float* start, const float* widths, const float* in_scale,
                           const float* out_scale, const float* qmin, const int64_t* counts,
                           long room, float narrowest, float smallest, void* out, uint8_t* index,
                           long threads) {
    const Places places(numbers);
    const Trained trained = {start, widths, in_scale, out_scale, counts, room, narrowest, smallest};
    const auto used = used_by_all(trained, places.n_slots);
    std::vector<Cuts> cuts;
    for (const Used& own : used) cuts.emplace_back(own.cuts);
    typed(half, [=, &used, &cuts](auto kind) {
        using T = decltype(kind);
        const T* x = static_cast<const T*>(values);
        T* to = static_cast<T*>(out);
        for_pieces(places, threads, [=, &used, &cuts](long j, long, const Piece& piece) {
            const Used& own = used[j];
            uint8_t* below = index + (j * places.rows + piece.row) * places.columns + piece.offset;
            thresholds_block(x + piece.at, own.beta, cuts[j], own.step, qmin[j],
                             to + piece.at, below, piece.size);
        });
    });
}

extern "C" void thresholds_backward(long half, const void* values, const int64_t* numbers,
                                    const void* upstream, const uint8_t* index, const float* start,
                                    const float* widths, const float* in_scale,
                                    const float* out_scale, const float* qmin,
                                    const int64_t* counts, long room, float narrowest,
                                    float smallest, void* grad_values, float* grad_start,
                                    float* grad_widths, float* grad_in, float* grad_out,
                                    long threads) {
    const Places places(numbers);
    const Trained trained = {start, widths, in_scale, out_scale, counts, room, narrowest, smallest};
    const auto used = used_by_all(trained, places.n_slots);
    const long most = 2 * (room + 1) + 1;
    std::vector<float> parts(most * places.n_slots * places.chunks());
    float* part = parts.data();
    typed(half, [=, &used](auto kind) {
        using T = decltype(kind);
        const T *x = static_cast<const T*>(values), *gradient = static_cast<const T*>(upstream);
        T* to = static_cast<T*>(grad_values);
        for_chunks(places, threads, [=, &used](long chunk, long j, long first, long last) {
            const Used& own = used[j];
            const Intervals known = {own.knots.data(), own.slopes.data(), own.m + 1, own.beta,
                                     qmin[j]};
            IntervalSums by_interval(own.m + 1);
            float *sums = part + most * chunk, codes = 0.0f;
            for (long p = first; p < last; ++p) {
                const Piece piece(places, j, p);
                const uint8_t* below =
                    index + (j * places.rows + piece.row) * places.columns + piece.offset;
                codes += interval_slopes(known, x + piece.at, gradient + piece.at, below,
                                         to + piece.at, by_interval, piece.size);
            }
            by_interval.total(sums);
            sums[2 * (own.m + 1)] = codes;
        });
    });
    for (long j = 0; j < places.n_slots; ++j) {
        const auto own = parts.begin() + most * places.chunks() * j;
        std::vector<float> sums(most);
        total_of({own, own + most * places.chunks()}, most, sums.data());
        used[j].gradients(trained, j, sums.data(), grad_start, grad_widths, grad_in, grad_out);
    }
}

// Channel means of each row, # shape: (slots, rows, channels); a channel's values lie together.
extern "C" void means(long half, const void* values, const int64_t* numbers, long n_channels,
                      float* out, long threads) {
    const Places places(numbers);
    const long n_pixels = places.columns / n_channels;
    typed(half, [=](auto kind) {
        using T = decltype(kind);
        const T* v = static_cast<const T*>(values);
        for_chunks(places, threads, [=](long, long j, long first, long last) {
            for (long p = first; p < last; ++p) {
                const Piece piece(places, j, p);
                if (piece.offset != 0) continue;  // the row's first piece stands for all
                float* to = out + (j * places.rows + piece.row) * n_channels;
                for (long c = 0; c < n_channels; ++c) {
                    const T* own = v + piece.at + c * n_pixels;
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (long i = 0; i < n_pixels; ++i) sum += load(own, i);
                    to[c] = sum / n_pixels;
                }
            }
        });
    });
}

// Add what channel means pass back: `to_means`, # shape: (slots, rows, channels)
extern "C" void means_backward(long half, void* grad_values, const int64_t* numbers,
                               long n_channels, const float* to_means, long threads) {
    const Places places(numbers);
    const long n_pixels = places.columns / n_channels;
    typed(half, [=](auto kind) {
        using T = decltype(kind);
        T* to = static_cast<T*>(grad_values);
        for_pieces(places, threads, [=](long j, long, const Piece& piece) {
            const float* own = to_means + (j * places.rows + piece.row) * n_channels;
            for (long i = 0; i < piece.size;) {
                const long c = (piece.offset + i) / n_pixels;
                const float share = own[c] / n_pixels;
                const long rest = (c + 1) * n_pixels - piece.offset;
                const long end = rest < piece.size ? rest : piece.size;
#pragma omp simd
                for (long k = i; k < end; ++k)
                    store(to + piece.at, k, load(to + piece.at, k) + share);
                i = end;
            }
        });
    });
}
