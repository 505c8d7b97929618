// Attention of packed segments, forward and backward.
//
// Segments form trees: an input follows its prompt, a label its input. A token attends to all tokens of its
// segment's ancestors, and of its own segment to those up to itself, to all, or to none. Nothing is gathered, padded or
// kept but q, k and v: a tree's keys and values for one head lie in the processor's cache while all that look at them run.
//
// Memory: q, out and their gradients [tokens, heads, size], k, v and theirs [given + tokens, key_heads, size].
#include "vectors.h"

#define BLOCK 32  // tokens of a segment whose scores are computed at once

enum { CAUSAL, WHOLE, ANCESTORS };  // what a token sees: its segment up to itself, all of it, or none of it

typedef struct {
    int64_t heads, key_heads, size;
    float scaling;
    const float *cosine, *sine;  // [tokens, size / 2] of each token's position, or NULL
    int64_t given;           // keys before those of the first token that runs; they are rotated already
    const int64_t *start;    // first token of each segment; negative where it is given
    const int64_t *length;
    const int64_t *parent;   // -1 at the root
    int64_t sees;
    const float *bias;       // [heads, bias_row]: added to scores, by the distance from query to key; or NULL
    int64_t bias_row, bias_zero;  // where in a row the distance 0 stands
} Layout;

// Keys and values of a segment's ancestors and, behind them, its own, for one head; and their gradients.
typedef struct {
    int64_t before, count, room;  // tokens of the ancestors, all tokens, and how many there may be
    float *k, *v;                 // [room, size]
    float *kt, *vt;               // [size, room]
    float *dk, *dv;               // [room, size]
} Keys;

typedef struct {
    Keys keys;
    float *q, *grad, *out;   // [BLOCK x group, padded size]
    float *p, *d;            // [BLOCK x group, room]: probabilities, and gradients of scores
    float *inverse;          // [BLOCK x group]: 1 / the sum of a row of p, where that is left out of p
} Scratch;

static float *floats(int64_t n) {
    void *p = aligned_alloc(64, (size_t)((n * 4 + 63) / 64 * 64 + 64));
    if (!p) abort();
    return p;
}

static Keys make_keys(int64_t room, int64_t size, int backward) {
    Keys keys = {.room = room};
    keys.k = floats(room * size), keys.v = floats(room * size);
    keys.kt = floats(room * size);
    if (backward) keys.vt = floats(room * size), keys.dk = floats(room * size), keys.dv = floats(room * size);
    return keys;
}

static void free_keys(Keys *keys) {
    free(keys->k), free(keys->v), free(keys->kt), free(keys->vt), free(keys->dk), free(keys->dv);
}

static Scratch make_scratch(const Layout *l, int64_t most_before, int64_t most_own, int backward) {
    int64_t size = padded(l->size), rows = BLOCK * (l->heads / l->key_heads);
    Scratch s = {.keys = make_keys(padded(most_before + most_own), size, backward)};
    s.q = floats(rows * size), s.grad = floats(rows * size), s.out = floats(rows * size);
    s.p = floats(rows * s.keys.room), s.inverse = floats(rows);
    if (backward) s.d = floats(rows * s.keys.room);
    return s;
}

static void free_scratch(Scratch *s) {
    free_keys(&s->keys);
    free(s->q), free(s->grad), free(s->out);
    free(s->p), free(s->d), free(s->inverse);
}

// x [size] of a token is rotated to its position: each pair (i, i + size / 2) by its own angle (Su et al. 2021).
// With `back` the other way round, as gradients are.
static inline void rotate(const Layout *l, const float *restrict x, float *restrict y, int64_t token, float factor, int back) {
    if (!l->cosine || token < 0) {
        for (int64_t d = 0; d < l->size; d++) y[d] = x[d] * factor;
        return;
    }
    int64_t half = l->size / 2;
    const float *cosine = l->cosine + token * half, *sine = l->sine + token * half;
    float way = back ? -factor : factor;
    for (int64_t d = 0; d < half; d++) {
        float a = x[d], b = x[d + half];
        y[d] = a * cosine[d] * factor - b * sine[d] * way;
        y[d + half] = b * cosine[d] * factor + a * sine[d] * way;
    }
}

// Append tokens [from, from + length) of one head.
static void add_keys(const Layout *l, Keys *keys, const float *k, const float *v, int64_t head, int64_t from, int64_t length) {
    int64_t size = padded(l->size);
    for (int64_t t = 0; t < length; t++) {
        int64_t place = ((from + t + l->given) * l->key_heads + head) * l->size;
        float *to_k = keys->k + (keys->count + t) * size, *to_v = keys->v + (keys->count + t) * size;
        rotate(l, k + place, to_k, from + t, 1.0f, 0);
        memcpy(to_v, v + place, (size_t)l->size * 4);
        memset(to_k + l->size, 0, (size_t)(size - l->size) * 4), memset(to_v + l->size, 0, (size_t)(size - l->size) * 4);
    }
    keys->count += length;
}

// x [rows, columns], from row `first` on -> its columns, as rows that lie `room` apart; zeros fill the last vector.
static void transpose(const float *x, float *to, int64_t first, int64_t rows, int64_t columns, int64_t room) {
    for (int64_t j = 0; j < columns; j++) {
        for (int64_t i = first; i < rows; i++) to[j * room + i] = x[i * columns + j];
        for (int64_t i = rows; i < padded(rows); i++) to[j * room + i] = 0.0f;
    }
}

// Make what the products want of the keys from `first` on.
static void finish_keys(const Layout *l, Keys *keys, int64_t first, int backward) {
    int64_t size = padded(l->size), added = (keys->count - first) * size;
    transpose(keys->k, keys->kt, first, keys->count, size, keys->room);
    if (!backward) return;
    transpose(keys->v, keys->vt, first, keys->count, size, keys->room);
    memset(keys->dk + first * size, 0, (size_t)added * 4), memset(keys->dv + first * size, 0, (size_t)added * 4);
}

static int64_t add_ancestors(const Layout *l, Keys *keys, const float *k, const float *v, int64_t head, int64_t segment) {
    if (segment < 0) return 0;
    int64_t depth = add_ancestors(l, keys, k, v, head, l->parent[segment]);
    add_keys(l, keys, k, v, head, l->start[segment], l->length[segment]);
    return depth + 1;
}

// Add the gradients of a segment's keys, which lie from `first` on, to those of its tokens.
static void give_back(
    const Layout *l, const Keys *keys, float *dk, float *dv, int64_t head, int64_t segment, int64_t first) {
    int64_t size = padded(l->size);
    for (int64_t t = 0; t < l->length[segment]; t++) {
        int64_t token = l->start[segment] + t, place = ((token + l->given) * l->key_heads + head) * l->size;
        const float *own = keys->dv + (first + t) * size;
        float turned[size];
        rotate(l, keys->dk + (first + t) * size, turned, token, 1.0f, 1);
        for (int64_t d = 0; d < l->size; d++) {
            dk[place + d] += turned[d];
            dv[place + d] += own[d];
        }
    }
}

// The same for a segment and all its ancestors, the root's keys first; returns how many keys these are.
static int64_t give_back_ancestors(
    const Layout *l, const Keys *keys, float *dk, float *dv, int64_t head, int64_t segment) {
    if (segment < 0) return 0;
    int64_t first = give_back_ancestors(l, keys, dk, dv, head, l->parent[segment]);
    give_back(l, keys, dk, dv, head, segment, first);
    return first + l->length[segment];
}

// Rows of the queries' memory that belong to one group of heads -> [count x group, size]; queries are rotated and scaled.
static void load_rows(const Layout *l, const float *from, float *to, int64_t head, int64_t first, int64_t count, int query) {
    int64_t group = l->heads / l->key_heads, size = padded(l->size);
    for (int64_t t = 0; t < count; t++)
        for (int64_t g = 0; g < group; g++) {
            const float *x = from + ((first + t) * l->heads + head * group + g) * l->size;
            float *y = to + (t * group + g) * size;
            if (query)
                rotate(l, x, y, first + t, l->scaling, 0);
            else
                memcpy(y, x, (size_t)l->size * 4);
            for (int64_t d = l->size; d < size; d++) y[d] = 0.0f;
        }
}

static void store_rows(const Layout *l, const float *from, float *to, int64_t head, int64_t first, int64_t count, int query) {
    int64_t group = l->heads / l->key_heads, size = padded(l->size);
    for (int64_t t = 0; t < count; t++)
        for (int64_t g = 0; g < group; g++) {
            float *x = to + ((first + t) * l->heads + head * group + g) * l->size;
            const float *y = from + (t * group + g) * size;
            if (query)
                rotate(l, y, x, first + t, l->scaling, 1);
            else
                memcpy(x, y, (size_t)l->size * 4);
        }
}

// Scores -> their exponentials, of which the largest is 1; zeros from `seen` up to `wide`. Returns 1 / their sum.
static inline float softmax_row(float *row, int64_t seen, int64_t wide) {
    // Entries beyond the last one fill a vector; in place of it they are no larger, and not more of a NaN.
    int64_t some = padded(seen);
    for (int64_t j = seen; j < some; j++) row[j] = row[0];
    vector most = *(const vector *)row, sums = {0};
    for (int64_t j = LANES; j < some; j += LANES) {
        vector x = *(const vector *)(row + j);
        most = chosen(x > most, x, most);
    }
    float largest = most[0];
    for (int i = 1; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    for (int64_t j = 0; j < some; j += LANES) {
        vector *x = (vector *)(row + j);
        *x = exponentials(*x - largest);
    }
    for (int64_t j = seen; j < wide; j++) row[j] = 0.0f;
    for (int64_t j = 0; j < some; j += LANES) sums += *(const vector *)(row + j);
    return 1.0f / sum_of(sums);
}

// Keys that the segment's tokens see of which `end` is the one behind the last.
static inline int64_t seen_keys(const Layout *l, const Keys *keys, int64_t end) {
    return l->sees == CAUSAL ? keys->before + end : keys->count;
}

// Probabilities of a block of tokens over the first `wide` keys, each times its row's sum.
static void probabilities(const Layout *l, Scratch *s, int64_t head, int64_t first, int64_t rows, int64_t wide) {
    int64_t group = l->heads / l->key_heads, size = padded(l->size), room = s->keys.room;
    product(s->p, room, s->q, size, 1, s->keys.kt, room, rows, wide, size, 0);
    for (int64_t r = 0; r < rows; r++) {
        float *row = s->p + r * room;
        if (l->bias) {
            int64_t query = s->keys.before + first + r / group;
            const float *bias = l->bias + (head * group + r % group) * l->bias_row + l->bias_zero - query;
            for (int64_t j = 0; j < wide; j += LANES) *(vector *)(row + j) += *(const vector *)(bias + j);
        }
        s->inverse[r] = softmax_row(row, seen_keys(l, &s->keys, first + r / group + 1), wide);
    }
}

static inline void scale_row(float *row, int64_t wide, float factor) {
    for (int64_t j = 0; j < wide; j += LANES) *(vector *)(row + j) *= factor;
}

static void segment_forward(const Layout *l, Scratch *s, const float *q, float *out, int64_t head, int64_t segment) {
    int64_t group = l->heads / l->key_heads, size = padded(l->size), room = s->keys.room;
    for (int64_t first = 0; first < l->length[segment]; first += BLOCK) {
        int64_t left = l->length[segment] - first, count = left < BLOCK ? left : BLOCK, rows = count * group;
        int64_t keys = seen_keys(l, &s->keys, first + count);
        load_rows(l, q, s->q, head, l->start[segment] + first, count, 1);
        probabilities(l, s, head, first, rows, padded(keys));
        product(s->out, size, s->p, room, 1, s->keys.v, size, rows, size, keys, 0);
        for (int64_t r = 0; r < rows; r++) scale_row(s->out + r * size, size, s->inverse[r]);
        store_rows(l, s->out, out, head, l->start[segment] + first, count, 0);
    }
}

// p x inverse -> p, and d <- p x (d - sum(p x d)), row by row: the softmax's backward.
static void softmax_backward(Scratch *s, int64_t rows, int64_t wide) {
    for (int64_t r = 0; r < rows; r++) {
        float *p = s->p + r * s->keys.room, *d = s->d + r * s->keys.room;
        vector sums = {0};
        for (int64_t j = 0; j < wide; j += LANES) {
            vector own = *(vector *)(p + j) * s->inverse[r];
            *(vector *)(p + j) = own;
            sums += own * *(const vector *)(d + j);
        }
        float dot = sum_of(sums);
        for (int64_t j = 0; j < wide; j += LANES)
            *(vector *)(d + j) = *(const vector *)(p + j) * (*(const vector *)(d + j) - dot);
    }
}

static void segment_backward(
    const Layout *l, Scratch *s, const float *q, const float *grad, float *dq, int64_t head, int64_t segment) {
    int64_t group = l->heads / l->key_heads, size = padded(l->size), room = s->keys.room;
    for (int64_t first = 0; first < l->length[segment]; first += BLOCK) {
        int64_t left = l->length[segment] - first, count = left < BLOCK ? left : BLOCK, rows = count * group;
        int64_t keys = seen_keys(l, &s->keys, first + count), wide = padded(keys);
        load_rows(l, q, s->q, head, l->start[segment] + first, count, 1);
        load_rows(l, grad, s->grad, head, l->start[segment] + first, count, 0);
        probabilities(l, s, head, first, rows, wide);
        product(s->d, room, s->grad, size, 1, s->keys.vt, room, rows, wide, size, 0);
        softmax_backward(s, rows, wide);
        product(s->out, size, s->d, room, 1, s->keys.k, size, rows, size, keys, 0);
        store_rows(l, s->out, dq, head, l->start[segment] + first, count, 1);
        product(s->keys.dv, size, s->p, 1, room, s->grad, size, keys, size, rows, 1);
        product(s->keys.dk, size, s->d, 1, room, s->q, size, keys, size, rows, 1);
    }
}

// Run the segments order[tree[i]] to order[tree[i + 1]] of each tree i; siblings stand beside each other.
// Given `grad`, the backward pass: dq, dk and dv (zeros before) are what comes out.
void packed_attention(
    const int64_t *sides, float scaling, const float *cosine, const float *sine, const float *bias, const int64_t *start,
    const int64_t *length, const int64_t *parent, const int64_t *order, const int64_t *tree, const float *q, const float *k,
    const float *v, float *out, const float *grad, float *dq, float *dk, float *dv) {
    int64_t trees = sides[4], most_before = sides[5], most_own = sides[6];
    const Layout l = {sides[0], sides[1], sides[2], scaling, cosine, sine, sides[3], start, length, parent,
                      sides[7], bias, sides[8], sides[9]};
    int backward = grad != NULL;
#pragma omp parallel
    {
        Scratch s = make_scratch(&l, most_before, most_own, backward);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t i = 0; i < trees; i++)
            for (int64_t head = 0; head < l.key_heads; head++) {
                int64_t family = -2;
                for (int64_t place = tree[i]; place < tree[i + 1]; place++) {
                    int64_t segment = order[place];
                    if (parent[segment] != family) {
                        if (backward) give_back_ancestors(&l, &s.keys, dk, dv, head, family);
                        family = parent[segment];
                        s.keys.count = 0;
                        add_ancestors(&l, &s.keys, k, v, head, family);
                        s.keys.before = s.keys.count;
                        finish_keys(&l, &s.keys, 0, backward);
                    }
                    s.keys.count = s.keys.before;
                    if (l.sees != ANCESTORS) {
                        add_keys(&l, &s.keys, k, v, head, start[segment], length[segment]);
                        finish_keys(&l, &s.keys, s.keys.before, backward);
                    }
                    if (!backward) {
                        segment_forward(&l, &s, q, out, head, segment);
                        continue;
                    }
                    segment_backward(&l, &s, q, grad, dq, head, segment);
                    if (l.sees != ANCESTORS) give_back(&l, &s.keys, dk, dv, head, segment, s.keys.before);
                }
                if (backward) give_back_ancestors(&l, &s.keys, dk, dv, head, family);
            }
        free_scratch(&s);
    }
}

static inline float dot(const float *restrict a, const float *restrict b, int64_t size) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < size; d++) sum += a[d] * b[d];
    return sum;
}

static inline void add_times(float *restrict to, const float *restrict x, float factor, int64_t size) {
#pragma omp simd
    for (int64_t d = 0; d < size; d++) to[d] += x[d] * factor;
}

// One token a row, behind keys and values that lie where they are. Row b has the parts [first[b], first[b + 1]): each is
// `length` tokens [key_heads, size] at the addresses `keys` and `values`. A row's last part ends with room for its new
// token, which q, k and v [rows, heads or key_heads, size] are of; its key and value are put there.
void growing_attention(
    const int64_t *sides, float scaling, const float *cosine, const float *sine, const int64_t *first,
    const int64_t *keys, const int64_t *values, const int64_t *length, const float *q, const float *k, const float *v,
    float *out) {
    int64_t rows = sides[3], most = padded(sides[4]);
    const Layout l = {.heads = sides[0], .key_heads = sides[1], .size = sides[2], .scaling = scaling, .cosine = cosine,
                      .sine = sine};
    int64_t group = l.heads / l.key_heads, apart = l.key_heads * l.size;
#pragma omp parallel
    {
        float *turned = floats(group * l.size), *p = floats(group * most);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t b = 0; b < rows; b++)
            for (int64_t head = 0; head < l.key_heads; head++) {
                int64_t last = first[b + 1] - 1, place = (length[last] - 1) * apart + head * l.size, count = 0;
                rotate(&l, k + b * apart + head * l.size, (float *)keys[last] + place, b, 1.0f, 0);
                memcpy((float *)values[last] + place, v + b * apart + head * l.size, (size_t)l.size * 4);
                for (int64_t g = 0; g < group; g++)
                    rotate(&l, q + (b * l.heads + head * group + g) * l.size, turned + g * l.size, b, scaling, 0);
                for (int64_t part = first[b]; part <= last; part++)
                    for (int64_t t = 0; t < length[part]; t++, count++) {
                        const float *key = (const float *)keys[part] + t * apart + head * l.size;
                        for (int64_t g = 0; g < group; g++) p[g * most + count] = dot(turned + g * l.size, key, l.size);
                    }
                float *to = out + (b * l.heads + head * group) * l.size;
                for (int64_t g = 0; g < group; g++) {
                    float inverse = softmax_row(p + g * most, count, padded(count));
                    scale_row(p + g * most, padded(count), inverse);
                }
                memset(to, 0, (size_t)(group * l.size) * 4);
                count = 0;
                for (int64_t part = first[b]; part <= last; part++)
                    for (int64_t t = 0; t < length[part]; t++, count++) {
                        const float *value = (const float *)values[part] + t * apart + head * l.size;
                        for (int64_t g = 0; g < group; g++)
                            add_times(to + g * l.size, value, p[g * most + count], l.size);
                    }
            }
        free(turned), free(p);
    }
}
