// SPDX-License-Identifier: GPL-2.0-only
/* Payload into a socket's send queue, by reference or as a copy. */
#include <linux/file.h>
#include <linux/module.h>
#include <linux/net.h>
#include <linux/udp.h>
#include "compat.h"
#include "omss.h"

#define MOST_SEGMENTS	64		/* UDP_MAX_SEGMENTS of all kernels */
#define MOST_BURST	65000		/* bytes: an IP packet with its headers */
#define MOST_FRAGS	16		/* one less than a packet may have */

unsigned int omss_copy_below = 512;
module_param_named(copy_below, omss_copy_below, uint, 0644);
MODULE_PARM_DESC(copy_below, "sends of fewer bytes are copied, not shared (512)");

/* A route that cannot gather makes the socket layer copy. */
static bool gathers(const struct sock *sk)
{
	struct dst_entry *dst;
	bool yes;

	if (sk_is_tcp(sk))
		return sk->sk_route_caps & NETIF_F_SG;
	if (!(OMSS_FEATURES & OMSS_SHARED_DATAGRAMS))
		return false;
	rcu_read_lock();
	dst = rcu_dereference(sk->sk_dst_cache);
	yes = dst && (dst->dev->features & NETIF_F_SG);
	rcu_read_unlock();
	return yes;
}

static bool shares(const struct omss_sink *sink, size_t bytes)
{
	const struct omss_source *setup = &sink->member.session->setup;

	return !(setup->flags & OMSS_COPY) &&
	       bytes >= (setup->copy_below ?: READ_ONCE(omss_copy_below)) &&
	       gathers(sink->member.sk);
}

static unsigned long pages_in(const struct bio_vec *frag, size_t bytes)
{
	unsigned long pages = 0;
	size_t part;

	for (; bytes; bytes -= part, frag++) {
		part = min_t(size_t, bytes, frag->bv_len);
		pages += DIV_ROUND_UP(offset_in_page(frag->bv_offset) + part, PAGE_SIZE);
	}
	return pages;
}

static void count(struct omss_sink *sink, const struct bio_vec *frag, size_t sent, bool shared)
{
	sink->taken = jiffies;
	sink->sent.sends++;
	sink->sent.bytes += sent;
	if (shared) {
		sink->sent.shared += sent;
		sink->sent.pages += pages_in(frag, sent);
	} else {
		sink->sent.copied += sent;
	}
}

/*
 * By the socket layer. `segment`: the length of each datagram but the last, or 0. -EBADF:
 * the socket is being closed, and will leave.
 */
static int send_message(struct sock *sk, const struct bio_vec *frag, unsigned int frags,
			size_t bytes, u16 segment, bool shared)
{
	struct msghdr msg = { .msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL };
	union {
		struct cmsghdr header;
		u8 room[CMSG_SPACE(sizeof(u16))];
	} control = { };
	struct file *file = omss_file(sk);
	int sent;

	if (!file)
		return -EBADF;
	if (segment) {
		control.header.cmsg_level = SOL_UDP;
		control.header.cmsg_type = UDP_SEGMENT;
		control.header.cmsg_len = CMSG_LEN(sizeof(segment));
		*(u16 *)CMSG_DATA(&control.header) = segment;
		msg.msg_control = &control;
		msg.msg_controllen = sizeof(control);
	}
	iov_iter_bvec(&msg.msg_iter, ITER_SOURCE, frag, frags, bytes);
	sent = shared ? omss_send_pages(sk->sk_socket, &msg) : sock_sendmsg(sk->sk_socket, &msg);
	fput(file);
	return sent;
}

/* A datagram needs no more of its socket than that it is there: we hold it. */
static int transmit(struct omss_sink *sink, const struct bio_vec *frag, unsigned int frags,
		    size_t bytes, u16 segment)
{
	bool shared = shares(sink, bytes);
	int sent = 0;

	if (shared && bytes && !segment && !sink->member.stream)
		sent = omss_send_datagram(sink->member.sk, frag, frags, bytes);
	if (!sent)
		sent = send_message(sink->member.sk, frag, frags, bytes, segment, shared);
	if (sent >= 0)
		count(sink, frag, sent, shared);
	return sent;
}

/* The rest of the entry that is begun: 0 once it is in the send queue. */
int omss_send_rest(struct omss_sink *sink, struct omss_batch *batch)
{
	u32 left = sink->begun->bytes - sink->offset;
	unsigned int frags;
	int sent;

	frags = omss_append_frags(batch->scratch, 0, OMSS_BATCH, sink->begun, sink->offset);
	sent = transmit(sink, batch->scratch, frags, left, 0);
	if (sent < 0)
		return sent;
	sink->offset += sent;
	if (sent < left)
		return -EAGAIN;
	omss_entry_put(sink->begun);
	sink->begun = NULL;
	sink->sent.entries++;
	return 0;
}

static void advance(struct omss_sink *sink, struct omss_batch *batch, size_t sent)
{
	struct omss_entry *entry;
	unsigned int i;

	for (i = 0; i < batch->count; i++) {
		entry = batch->entry[i];
		if (sent < entry->bytes)
			break;
		sent -= entry->bytes;
		sink->cursor++;
		sink->sent.entries++;
	}
	if (!sent)
		return;
	refcount_inc(&entry->users);
	sink->begun = entry;
	sink->offset = sent;
	sink->cursor++;
}

/* All of the batch in one send: 0, -EAGAIN if not all was taken, or an error. */
int omss_send_stream(struct omss_sink *sink, struct omss_batch *batch)
{
	int sent = 0;

	if (batch->bytes) /* else nothing but empty datagrams */
		sent = transmit(sink, batch->frag, batch->frags, batch->bytes, 0);
	if (sent < 0)
		return sent;
	advance(sink, batch, sent);
	return sent < batch->bytes ? -EAGAIN : 0;
}

/*
 * Datagrams from `first` on that can go as one burst (UDP_SEGMENT): of one length, the
 * last one may be shorter. Their payload is gathered in `scratch`, for most of them.
 */
static unsigned int gather(struct omss_sink *sink, struct omss_batch *batch, unsigned int first,
			   const struct bio_vec **frag, unsigned int *frags, size_t *bytes)
{
	u32 length = batch->entry[first]->bytes, last = length;
	unsigned int many = 1, next;

	*frag = batch->frag;
	*frags = batch->frags;
	*bytes = batch->bytes;
	if (batch->count == 1)
		return 1;
	*frag = batch->scratch;
	*frags = omss_append_frags(batch->scratch, 0, OMSS_BATCH, batch->entry[first], 0);
	*bytes = length;
	if (sink->no_bursts || !length)
		return 1;
	for (; first + many < batch->count && many < MOST_SEGMENTS && last == length; many++) {
		last = batch->entry[first + many]->bytes;
		if (!last || last > length || *bytes + last > MOST_BURST)
			break;
		next = omss_append_frags(batch->scratch, *frags, MOST_FRAGS,
					 batch->entry[first + many], 0);
		if (!next)
			break;
		*frags = next;
		*bytes += last;
	}
	return many;
}

/* The route, or the socket, has no UDP_SEGMENT. */
static bool no_burst(int err)
{
	return err == -EIO || err == -EINVAL || err == -EMSGSIZE || err == -EOPNOTSUPP;
}

/* One datagram an entry. What the network refuses is dropped, as it would be on the way. */
int omss_send_datagrams(struct omss_sink *sink, struct omss_batch *batch)
{
	unsigned int i = 0, many, frags;
	const struct bio_vec *frag;
	bool told = false;
	size_t bytes;
	int err;

	while (i < batch->count) {
		many = gather(sink, batch, i, &frag, &frags, &bytes);
		err = transmit(sink, frag, frags, bytes, many > 1 ? batch->entry[i]->bytes : 0);
		if (err == -EAGAIN || err == -EDESTADDRREQ || err == -EPIPE || err == -EBADF)
			return err;
		if (many > 1 && no_burst(err)) {
			sink->no_bursts = true;
			continue;
		}
		if (err == -ECONNREFUSED && !told) { /* that was another one */
			sink->sent.drops[OMSS_DROP_REFUSED]++;
			told = true;
			continue;
		}
		told = false;
		if (err < 0)
			sink->sent.drops[OMSS_DROP_ERROR] += many;
		else
			sink->sent.entries += many;
		sink->cursor += many;
		i += many;
	}
	return 0;
}
