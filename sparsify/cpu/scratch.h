/* Memory for one call. */

/* One buffer is kept between calls, since fresh pages cost a tenth of a large call. A call that finds it in use by another
   thread takes memory of its own. */
static char *kept;

static char *take(int64_t bytes) {
    char *found = __atomic_exchange_n(&kept, NULL, __ATOMIC_ACQUIRE);
    if (found && *(int64_t *)found >= bytes) return found;
    free(found);
    found = aligned_alloc(64, (size_t)bytes);
    if (found) *(int64_t *)found = bytes;
    return found;
}

static void give_back(char *buffer) {
    if (buffer && *(int64_t *)buffer > KEPT_BYTES) free(buffer);
    else free(__atomic_exchange_n(&kept, buffer, __ATOMIC_RELEASE));
}

static char *cut(char **from, int64_t bytes) {
    char *start = *from;
    *from += round_up(bytes, 64);
    return start;
}
