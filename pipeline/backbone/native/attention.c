// Attention of packed segments, forward and backward.
//
// Segments form trees: an input follows its prompt, a label its input. A token attends to all tokens of its
// segment's ancestors, and causally to its own segment. Nothing is gathered, padded or kept but q, k and v: a
// tree's keys and values for one head lie in the processor's cache while all that look at them run.
//
// Memory: q, out and their gradients [tokens, heads, size], k, v and theirs [given + tokens, key_heads, size].
#include "vectors.h"

#define BLOCK 32  // tokens of a segment whose scores are computed at once

typedef struct {
    int64_t heads, key_heads, size;
    float scaling;
    const float *cosine, *sine;  // [tokens, size / 2] of each token's position, or NULL
    int64_t given;           // keys before those of the first token that runs; they are rotated already
    const int64_t *start;    // first token of each segment; negative where it is given
    const int64_t *length;
    const int64_t *parent;   // -1 at the root
} Layout;

// Keys and values of some tokens for one head, and their gradients, as the products want them.
typedef struct {
    int64_t count, room;
    float *k, *v;            // [room, size]
    float *kt, *vt;          // [size, room]
    float *dk, *dv;          // [room, size]
} Keys;

typedef struct {
    Keys before, own;
    float *q, *grad, *out;   // [BLOCK x group, padded size]
    float *p_before, *p_own, *d_before, *d_own;  // [BLOCK x group, room]
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
    Scratch s = {.before = make_keys(padded(most_before), size, backward), .own = make_keys(padded(most_own), size, backward)};
    s.q = floats(rows * size), s.grad = floats(rows * size), s.out = floats(rows * size);
    s.p_before = floats(rows * s.before.room), s.p_own = floats(rows * s.own.room);
    if (backward) s.d_before = floats(rows * s.before.room), s.d_own = floats(rows * s.own.room);
    return s;
}

static void free_scratch(Scratch *s) {
    free_keys(&s->before), free_keys(&s->own);
    free(s->q), free(s->grad), free(s->out);
    free(s->p_before), free(s->p_own), free(s->d_before), free(s->d_own);
}

// x [size] of a token is rotated to its position: each pair (i, i + size / 2) by its own angle (Su et al. 2021).
// With `back` the other way round, as gradients are.
static inline void rotate(const Layout *l, const float *x, float *y, int64_t token, float factor, int back) {
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

static void clear_keys(Keys *keys) { keys->count = 0; }

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

static void transpose(const float *x, float *to, int64_t rows, int64_t columns, int64_t room) {
    for (int64_t j = 0; j < columns; j++) {
        for (int64_t i = 0; i < rows; i++) to[j * room + i] = x[i * columns + j];
        for (int64_t i = rows; i < padded(rows); i++) to[j * room + i] = 0.0f;
    }
}

static void finish_keys(const Layout *l, Keys *keys, int backward) {
    int64_t size = padded(l->size);
    transpose(keys->k, keys->kt, keys->count, size, keys->room);
    if (!backward) return;
    transpose(keys->v, keys->vt, keys->count, size, keys->room);
    memset(keys->dk, 0, (size_t)(keys->count * size) * 4), memset(keys->dv, 0, (size_t)(keys->count * size) * 4);
}

static int64_t add_ancestors(const Layout *l, Keys *keys, const float *k, const float *v, int64_t head, int64_t segment) {
    if (segment < 0) return 0;
    int64_t depth = add_ancestors(l, keys, k, v, head, l->parent[segment]);
    add_keys(l, keys, k, v, head, l->start[segment], l->length[segment]);
    return depth + 1;
}

// Add the keys' gradients to those of the tokens that they came from; returns how many of them were done.
static int64_t give_back(const Layout *l, const Keys *keys, float *dk, float *dv, int64_t head, int64_t segment, int chain) {
    if (segment < 0) return 0;
    int64_t done = chain ? give_back(l, keys, dk, dv, head, l->parent[segment], 1) : 0;
    int64_t size = padded(l->size);
    for (int64_t t = 0; t < l->length[segment]; t++, done++) {
        int64_t token = l->start[segment] + t, place = ((token + l->given) * l->key_heads + head) * l->size;
        float *own = keys->dk + done * size;
        float turned[size];
        rotate(l, own, turned, token, 1.0f, 1);
        for (int64_t d = 0; d < l->size; d++) {
            dk[place + d] += turned[d];
            dv[place + d] += keys->dv[done * size + d];
        }
    }
    return done;
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

// Probabilities of a block of tokens over the keys before them and their own; token t of the segment sees t + 1 own keys.
static void probabilities(const Layout *l, Scratch *s, int64_t first, int64_t count) {
    int64_t group = l->heads / l->key_heads, size = padded(l->size), rows = count * group;
    int64_t before = s->before.count, own = first + count;
    if (before)
        product(s->p_before, s->before.room, s->q, size, 1, s->before.kt, s->before.room, rows, padded(before), size, 0);
    product(s->p_own, s->own.room, s->q, size, 1, s->own.kt, s->own.room, rows, padded(own), size, 0);
    for (int64_t r = 0; r < rows; r++) {
        float *b = s->p_before + r * s->before.room, *o = s->p_own + r * s->own.room;
        int64_t seen = first + r / group + 1;
        float largest = o[0], sum = 0.0f;
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < before; j++) largest = b[j] > largest ? b[j] : largest;
#pragma omp simd reduction(max : largest)
        for (int64_t j = 0; j < seen; j++) largest = o[j] > largest ? o[j] : largest;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < before; j++) sum += b[j] = exponential(b[j] - largest);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < seen; j++) sum += o[j] = exponential(o[j] - largest);
        float inverse = 1.0f / sum;
#pragma omp simd
        for (int64_t j = 0; j < before; j++) b[j] *= inverse;
#pragma omp simd
        for (int64_t j = 0; j < seen; j++) o[j] *= inverse;
        for (int64_t j = before; j < padded(before); j++) b[j] = 0.0f;
        for (int64_t j = seen; j < padded(own); j++) o[j] = 0.0f;
    }
}

static void segment_forward(const Layout *l, Scratch *s, const float *q, float *out, int64_t head, int64_t segment) {
    int64_t group = l->heads / l->key_heads, size = padded(l->size);
    for (int64_t first = 0; first < l->length[segment]; first += BLOCK) {
        int64_t left = l->length[segment] - first, count = left < BLOCK ? left : BLOCK, rows = count * group;
        load_rows(l, q, s->q, head, l->start[segment] + first, count, 1);
        probabilities(l, s, first, count);
        product(s->out, size, s->p_own, s->own.room, 1, s->own.v, size, rows, size, first + count, 0);
        if (s->before.count)
            product(s->out, size, s->p_before, s->before.room, 1, s->before.v, size, rows, size, s->before.count, 1);
        store_rows(l, s->out, out, head, l->start[segment] + first, count, 0);
    }
}

// d <- p x (d - sum(p x d)), row by row: the softmax's backward, over both kinds of keys together.
static void softmax_backward(Scratch *s, int64_t rows, int64_t own) {
    int64_t before = s->before.count;
    for (int64_t r = 0; r < rows; r++) {
        const float *pb = s->p_before + r * s->before.room, *po = s->p_own + r * s->own.room;
        float *db = s->d_before + r * s->before.room, *d = s->d_own + r * s->own.room, dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < before; j++) dot += pb[j] * db[j];
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < own; j++) dot += po[j] * d[j];
#pragma omp simd
        for (int64_t j = 0; j < before; j++) db[j] = pb[j] * (db[j] - dot);
#pragma omp simd
        for (int64_t j = 0; j < own; j++) d[j] = po[j] * (d[j] - dot);
    }
}

// Gradients of one kind of keys from a block: p [rows, keys] and d, the gradient of its scores.
static void keys_backward(Keys *keys, const Scratch *s, const float *p, const float *d, int64_t rows, int64_t count, int64_t size) {
    product(keys->dv, size, p, 1, keys->room, s->grad, size, count, size, rows, 1);
    product(keys->dk, size, d, 1, keys->room, s->q, size, count, size, rows, 1);
}

static void segment_backward(
    const Layout *l, Scratch *s, const float *q, const float *grad, float *dq, int64_t head, int64_t segment) {
    int64_t group = l->heads / l->key_heads, size = padded(l->size);
    for (int64_t first = 0; first < l->length[segment]; first += BLOCK) {
        int64_t left = l->length[segment] - first, count = left < BLOCK ? left : BLOCK, rows = count * group;
        int64_t own = first + count, before = s->before.count;
        load_rows(l, q, s->q, head, l->start[segment] + first, count, 1);
        load_rows(l, grad, s->grad, head, l->start[segment] + first, count, 0);
        probabilities(l, s, first, count);
        product(s->d_own, s->own.room, s->grad, size, 1, s->own.vt, s->own.room, rows, padded(own), size, 0);
        if (before)
            product(s->d_before, s->before.room, s->grad, size, 1, s->before.vt, s->before.room, rows, padded(before), size, 0);
        softmax_backward(s, rows, own);
        product(s->out, size, s->d_own, s->own.room, 1, s->own.k, size, rows, size, own, 0);
        if (before) product(s->out, size, s->d_before, s->before.room, 1, s->before.k, size, rows, size, before, 1);
        store_rows(l, s->out, dq, head, l->start[segment] + first, count, 1);
        keys_backward(&s->own, s, s->p_own, s->d_own, rows, own, size);
        if (before) keys_backward(&s->before, s, s->p_before, s->d_before, rows, before, size);
    }
}

// Run the segments order[tree[i]] to order[tree[i + 1]] of each tree i; siblings stand beside each other.
// Given `grad`, the backward pass: dq, dk and dv (zeros before) are what comes out.
void packed_attention(
    const int64_t *sides, float scaling, const float *cosine, const float *sine, const int64_t *start, const int64_t *length, const int64_t *parent,
    const int64_t *order, const int64_t *tree, const float *q, const float *k, const float *v, float *out,
    const float *grad, float *dq, float *dk, float *dv) {
    const Layout l = {sides[0], sides[1], sides[2], scaling, cosine, sine, sides[3], start, length, parent};
    int64_t trees = sides[4], most_before = sides[5], most_own = sides[6];
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
                        if (backward && family >= 0) give_back(&l, &s.before, dk, dv, head, family, 1);
                        family = parent[segment];
                        clear_keys(&s.before);
                        add_ancestors(&l, &s.before, k, v, head, family);
                        finish_keys(&l, &s.before, backward);
                    }
                    clear_keys(&s.own);
                    add_keys(&l, &s.own, k, v, head, start[segment], length[segment]);
                    finish_keys(&l, &s.own, backward);
                    if (!backward) {
                        segment_forward(&l, &s, q, out, head, segment);
                        continue;
                    }
                    segment_backward(&l, &s, q, grad, dq, head, segment);
                    give_back(&l, &s.own, dk, dv, head, segment, 0);
                }
                if (backward && family >= 0) give_back(&l, &s.before, dk, dv, head, family, 1);
            }
        free_scratch(&s);
    }
}
