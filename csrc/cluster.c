/* Which tokens of an image stay, and which of them represents each other one (star_edge/pruning/representatives.py, cluster).
 *
 * Distances are worked out from the products of all pairs as they are needed: a row for each token that is picked. Of equal ones the
 * lowest index always wins.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "simd.h"
#include "star_edge.h"

typedef struct {
    const se_points * p;
    const se_groups * g;
    float scale;        /* of distances: 1 / their mean */
    float * nearest;    /* (n) distance to the nearest one that stays, -1 for those */
    float * line;       /* (n) distances from one */
    uint8_t * stays; /* (n) */
    int32_t * owner;    /* (n) the one that represents each */
    uint8_t * broken; /* (n) whether that one is beyond the bound */
} state;

static float distance(const state * s, int32_t i, int32_t j) {
    const float x = 1.0f - s->p->products[(size_t) i * (size_t) s->p->n + (size_t) j];
    return x > 0.0f ? x : 0.0f;
}

static float far_between(const state * s, int32_t i, int32_t j) {
    if (i == j) return 0.0f;
    const float at = s->p->places ? s->p->places[(size_t) i * (size_t) s->p->n + (size_t) j] : 0.0f;
    return distance(s, i, j) * s->scale + s->p->place_weight * at;
}

SE_INLINE void distance_line(const state * s, int32_t i, float * out) {
    const float * products = s->p->products + (size_t) i * (size_t) s->p->n;
    for (int32_t j = 0; j < s->p->n; j++) {
        const float x = 1.0f - products[j];
        out[j] = x > 0.0f ? x : 0.0f;
    }
}

SE_INLINE void far_line(const state * s, int32_t i, float * out) {
    const int32_t n = s->p->n;
    const float scale = s->scale, weight = s->p->place_weight;
    distance_line(s, i, out);
    if (s->p->places) {
        const float * places = s->p->places + (size_t) i * (size_t) n;
        for (int32_t j = 0; j < n; j++) out[j] = out[j] * scale + weight * places[j];
    } else {
        for (int32_t j = 0; j < n; j++) out[j] *= scale;
    }
    out[i] = 0.0f;
}

/* Distances as the bound sees them: what is out of reach is over it, and still in the order of what is unlike. */
SE_INLINE void bound_line(const state * s, int32_t i, float * out) {
    distance_line(s, i, out);
    if (!s->g->row) return;
    const int32_t n = s->p->n, reach = s->g->reach, row = s->g->row[i], column = s->g->column[i];
    const float more = s->g->bound + 2.0f, own = out[i];
    for (int32_t j = 0; j < n; j++) {
        const int32_t down = s->g->row[j] - row, right = s->g->column[j] - column;
        const bool apart = (down > reach) | (-down > reach) | (right > reach) | (-right > reach);
        out[j] += apart ? more : 0.0f;
    }
    out[i] = own;
}

/* Eight sums, since one float would have to wait for each addition. */
SE_INLINE double sum_of(const float * x, int32_t n) {
    float lane[LANES] = { 0 };
    int32_t j = 0;
    for (; j + LANES <= n; j += LANES) {
        for (int l = 0; l < LANES; l++) lane[l] += x[j + l];
    }
    double sum = 0.0;
    for (; j < n; j++) sum += (double) x[j];
    for (int l = 0; l < LANES; l++) sum += (double) lane[l];
    return sum;
}

/* The lowest index of the largest value. */
SE_INLINE int32_t largest(const float * x, int32_t n) {
    float value[LANES];
    int32_t at[LANES], j = 0;
    for (int l = 0; l < LANES; l++) {
        value[l] = -INFINITY;
        at[l] = n;
    }
    for (; j + LANES <= n; j += LANES) {
        for (int l = 0; l < LANES; l++) {
            const bool more = x[j + l] > value[l];
            value[l] = more ? x[j + l] : value[l];
            at[l] = more ? j + l : at[l];
        }
    }
    float best = -INFINITY;
    int32_t found = n;
    for (int l = 0; l < LANES; l++) {
        if (value[l] > best || (value[l] == best && at[l] < found)) {
            best = value[l];
            found = at[l];
        }
    }
    for (; j < n; j++) {
        if (x[j] > best) {
            best = x[j];
            found = j;
        }
    }
    return found < n ? found : 0; /* of nothing but NaN */
}

SE_INLINE void come_nearer(float * nearest, const float * line, int32_t n) {
    for (int32_t j = 0; j < n; j++) nearest[j] = line[j] < nearest[j] ? line[j] : nearest[j];
}

/* ---- picking ---- */

SE_CLONES
static void measure(state * s) {
    const int32_t n = s->p->n;
    double sum = 0.0;
    for (int32_t i = 0; i < n; i++) {
        distance_line(s, i, s->line);
        sum += sum_of(s->line, n);
    }
    const double mean = sum / ((double) n * (double) n);
    s->scale = (float) (1.0 / (mean > 1e-12 ? mean : 1e-12));
}

/* The one that is farthest from all others together. */
SE_CLONES
static int32_t farthest_of_all(state * s) {
    double most = -INFINITY;
    int32_t found = 0;
    for (int32_t i = 0; i < s->p->n; i++) {
        far_line(s, i, s->line);
        const double sum = sum_of(s->line, s->p->n);
        if (sum > most) {
            most = sum;
            found = i;
        }
    }
    return found;
}

/* Starts `nearest` with the points that stay. */
SE_CLONES
static void begin_far(state * s) {
    const int32_t n = s->p->n;
    for (int32_t j = 0; j < n; j++) s->nearest[j] = INFINITY;
    for (int32_t i = 0; i < n; i++) {
        if (!s->stays[i]) continue;
        far_line(s, i, s->line);
        come_nearer(s->nearest, s->line, n);
    }
    for (int32_t j = 0; j < n; j++) s->nearest[j] = s->stays[j] ? -1.0f : s->nearest[j];
}

/* Picks the farthest one and returns how far it was. */
SE_CLONES
static float pick_far(state * s, int32_t * pick) {
    const int32_t at = largest(s->nearest, s->p->n);
    const float was = s->nearest[at];
    s->stays[at] = 1;
    far_line(s, at, s->line);
    come_nearer(s->nearest, s->line, s->p->n);
    s->nearest[at] = -1.0f;
    *pick = at;
    return was;
}

/* Picks the farthest one by distance alone until all are within the bound, or `most` stay. Returns whether some are still too far. */
SE_CLONES
static bool pick_within(state * s, int32_t n_stay) {
    const int32_t n = s->p->n;
    for (int32_t j = 0; j < n; j++) s->nearest[j] = INFINITY;
    for (int32_t i = 0; i < n; i++) {
        if (!s->stays[i]) continue;
        bound_line(s, i, s->line);
        come_nearer(s->nearest, s->line, n);
    }
    for (int32_t j = 0; j < n; j++) s->nearest[j] = s->stays[j] ? -1.0f : s->nearest[j];
    for (;; n_stay++) {
        const int32_t at = largest(s->nearest, n);
        if (!(s->nearest[at] > s->g->bound)) return false;
        if (n_stay >= s->g->most) return true;
        s->stays[at] = 1;
        bound_line(s, at, s->line);
        come_nearer(s->nearest, s->line, n);
        s->nearest[at] = -1.0f;
    }
}

SE_CLONES
static void look_around(state * s, float bound, const int32_t * rows, const int32_t * columns, uint8_t * flat, uint8_t * unlike) {
    const int32_t n = s->p->n;
    for (int32_t i = 0; i < n; i++) {
        const int32_t row = rows[i], column = columns[i];
        int32_t n_like = 0, n_touching = -1; /* not itself */
        distance_line(s, i, s->line);
        s->line[i] = INFINITY;
        for (int32_t j = 0; j < n; j++) {
            const int32_t down = rows[j] - row, right = columns[j] - column;
            const int32_t touches = (down <= 1) & (down >= -1) & (right <= 1) & (right >= -1);
            n_touching += touches;
            n_like += touches & (s->line[j] <= bound);
        }
        flat[i] = n_like > 0;
        unlike[i] = n_like < n_touching;
    }
}

SE_CLONES
static void find_ground(state * s, float bound, const uint8_t * flat, uint8_t * ground) {
    const int32_t n = s->p->n;
    int32_t most = 0, centre = -1;
    for (int32_t i = 0; i < n; i++) {
        if (!flat[i]) continue;
        int32_t count = 0;
        distance_line(s, i, s->line);
        for (int32_t j = 0; j < n; j++) count += flat[j] & (s->line[j] <= bound);
        if (centre < 0 || count > most) {
            most = count;
            centre = i;
        }
    }
    for (int32_t i = 0; i < n; i++) ground[i] = centre >= 0 && flat[i] && distance(s, centre, i) <= bound;
}

/* ---- groups ---- */

/* Every token goes to the nearest one that stays, of those within the bound if there are any. */
SE_CLONES
static void assign(state * s, float * within) {
    const int32_t n = s->p->n;
    const bool bounded = s->g->bound < INFINITY;
    int32_t first = 0;
    while (first < n - 1 && !s->stays[first]) first++;
    for (int32_t j = 0; j < n; j++) {
        s->nearest[j] = INFINITY;
        s->broken[j] = 1;
        s->owner[j] = first; /* if there are no numbers to compare */
    }
    for (int32_t i = 0; i < n; i++) {
        if (!s->stays[i]) continue;
        far_line(s, i, s->line);
        if (!bounded) {
            for (int32_t j = 0; j < n; j++) {
                const bool less = s->line[j] < s->nearest[j];
                s->nearest[j] = less ? s->line[j] : s->nearest[j];
                s->owner[j] = less ? i : s->owner[j];
            }
            continue;
        }
        bound_line(s, i, within);
        for (int32_t j = 0; j < n; j++) {
            const uint8_t over = within[j] > s->g->bound;
            if (over < s->broken[j] || (over == s->broken[j] && s->line[j] < s->nearest[j])) {
                s->broken[j] = over;
                s->nearest[j] = s->line[j];
                s->owner[j] = i;
            }
        }
    }
    for (int32_t j = 0; j < n; j++) {
        if (s->stays[j]) s->owner[j] = j; /* equal tokens have distance 0: each one that stays keeps a place of its own */
    }
}

/* In a group, the medoid takes over: the fewest members out of bounds, then those that are no farther from their farthest member than the
 * representative, then the least sum of distances by mass. */
static int32_t medoid(const state * s, const int32_t * member, int32_t size, int32_t representative) {
    float limit = 0.0f;
    for (int32_t j = 0; j < size; j++) {
        const float x = far_between(s, representative, member[j]);
        if (x > limit) limit = x;
    }
    limit += s->g->rounding;
    const bool bounded = s->g->bound < INFINITY;
    int32_t found = representative, fewest = INT32_MAX;
    bool is_wider = true;
    double least = INFINITY;
    for (int32_t i = 0; i < size; i++) {
        double cost = 0.0;
        float farthest = 0.0f;
        int32_t n_broken = 0;
        for (int32_t j = 0; j < size; j++) {
            const float x = far_between(s, member[i], member[j]);
            cost += (double) x * s->g->mass[member[j]];
            if (x > farthest) farthest = x;
            if (bounded && distance(s, member[i], member[j]) > s->g->bound) n_broken++;
        }
        const bool wider = farthest > limit;
        if (n_broken > fewest || (n_broken == fewest && (wider > is_wider || (wider == is_wider && !(cost < least))))) continue;
        found = member[i];
        fewest = n_broken;
        is_wider = wider;
        least = cost;
    }
    return found;
}

/* members (n) and start (n + 1): room for the tokens by group. */
static void take_over(state * s, int32_t * members, int32_t * start) {
    const int32_t n = s->p->n;
    memset(start, 0, ((size_t) n + 2) * sizeof *start);
    for (int32_t j = 0; j < n; j++) start[s->owner[j] + 2]++;
    for (int32_t i = 1; i <= n; i++) start[i + 1] += start[i];
    for (int32_t j = 0; j < n; j++) members[start[s->owner[j] + 1]++] = j;
    for (int32_t i = 0; i < n; i++) s->stays[i] = 0;
    for (int32_t i = 0; i < n; i++) {
        const int32_t size = start[i + 1] - start[i];
        if (size) s->stays[size > 1 ? medoid(s, members + start[i], size, i) : i] = 1;
    }
}

/* ---- the calls ---- */

static int begin(state * s, const se_points * p, const se_groups * g, void ** memory) {
    *memory = NULL;
    if (!p || !p->products || p->n < 1 || !isfinite(p->place_weight)) return SE_ERR_ARGUMENT;
    const size_t n = (size_t) p->n;
    float * floats = malloc(3 * n * sizeof(float) + (3 * n + 2) * sizeof(int32_t) + 2 * n);
    if (!floats) return SE_ERR_MEMORY;
    *memory = floats;
    *s = (state) { .p = p, .g = g, .nearest = floats, .line = floats + n };
    s->owner = (int32_t *) (void *) (floats + 3 * n);
    s->stays = (uint8_t *) (s->owner + 3 * n + 2);
    s->broken = s->stays + n;
    memset(s->stays, 0, n);
    return SE_OK;
}

int se_edges(const se_points * points, float bound, const int32_t * row, const int32_t * column, uint8_t * flat, uint8_t * unlike, uint8_t * ground) {
    if (!row || !column || !flat || !unlike || !ground || !(bound >= 0.0f)) return SE_ERR_ARGUMENT;
    state s;
    void * memory;
    const int error = begin(&s, points, NULL, &memory);
    if (!error) {
        look_around(&s, bound, row, column, flat, unlike);
        find_ground(&s, bound, flat, ground);
    }
    free(memory);
    return error;
}

int se_farthest(const se_points * points, int32_t k, int32_t * first) {
    if (!points || !first || k < 1 || k > points->n) return SE_ERR_ARGUMENT;
    state s;
    void * memory;
    const int error = begin(&s, points, NULL, &memory);
    if (!error) {
        float radius = 0.0f;
        measure(&s);
        first[0] = farthest_of_all(&s);
        s.stays[first[0]] = 1;
        begin_far(&s);
        for (int32_t i = 1; i < k; i++) {
            radius = pick_far(&s, &first[i]);
            if (radius < 0.0f) radius = 0.0f;
        }
        for (int32_t i = 0; i < k; i++) {
            int32_t j = 0;
            while (j < first[i] && !(far_between(&s, first[i], j) <= radius / 2)) j++;
            first[i] = j;
        }
    }
    free(memory);
    return error;
}

static int check(const se_points * p, const se_groups * g) {
    if (!p || !g || !g->mass || g->n_best < 0 || (g->n_best && !g->best)) return SE_ERR_ARGUMENT;
    if (g->k < 1 || g->k > p->n || !(g->bound >= 0.0f) || g->reach < 0 || !g->row != !g->column) return SE_ERR_ARGUMENT;
    for (int32_t i = 0; i < g->n_best; i++) {
        if (g->best[i] < 0 || g->best[i] >= p->n) return SE_ERR_ARGUMENT;
    }
    return SE_OK;
}

int se_cluster(const se_points * points, const se_groups * groups, int32_t * kept, int32_t * n_kept, int32_t * group, int32_t * too_few) {
    int error = check(points, groups);
    if (error || !kept || !n_kept || !group || !too_few) return SE_ERR_ARGUMENT;
    state s;
    void * memory;
    error = begin(&s, points, groups, &memory);
    if (error) {
        free(memory);
        return error;
    }
    const int32_t n = points->n;
    const bool bounded = groups->bound < INFINITY;
    *too_few = 0;
    measure(&s);
    for (int32_t i = 0; i < groups->n_best; i++) s.stays[groups->best[i]] = 1;
    int32_t n_stay = 0, pick;
    for (int32_t i = 0; i < n; i++) n_stay += s.stays[i];
    if (!n_stay) {
        s.stays[farthest_of_all(&s)] = 1;
        n_stay = 1;
    }
    if (n_stay < groups->k) begin_far(&s);
    for (; n_stay < groups->k; n_stay++) pick_far(&s, &pick);
    if (bounded && pick_within(&s, n_stay)) *too_few = 1;

    float * within = s.line + n;
    assign(&s, within);
    if (groups->medoids) {
        take_over(&s, s.owner + n, s.owner + 2 * (size_t) n);
        assign(&s, within);
    }
    *n_kept = 0;
    int32_t * index = s.owner + n;
    for (int32_t i = 0; i < n; i++) {
        if (!s.stays[i]) continue;
        index[i] = *n_kept;
        kept[(*n_kept)++] = i;
    }
    for (int32_t j = 0; j < n; j++) group[j] = index[s.owner[j]];
    free(memory);
    return SE_OK;
}
