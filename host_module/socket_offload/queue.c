// SPDX-License-Identifier: GPL-2.0-only
/* Between a socket's queues and the caller's memory. Under the socket lock. */
#include <linux/skbuff.h>
#include <linux/tcp.h>
#include <linux/uaccess.h>
#include <linux/uio.h>
#include "socket_offload.h"

#define SKOFF_PIECE	(32u << 10)	/* bytes in one skb that we make */

/* A segment whose FIN came before its turn is left out: its sender sends it again. */
static bool is_kept(const struct sk_buff *skb)
{
	return skb->len && !(TCP_SKB_CB(skb)->tcp_flags & TCPHDR_FIN);
}

void skoff_measure(const struct sock *sk, struct skoff_lengths *lengths)
{
	const struct tcp_sock *tp = tcp_sk(sk);
	bool fin = skoff_in(sk->sk_state, SKOFF_FIN_SENT);
	struct sk_buff *skb = skb_rb_first(&tp->out_of_order_queue);

	*lengths = (struct skoff_lengths) {
		.receive = tp->rcv_nxt - tp->copied_seq,
		.unacked = tp->snd_nxt - tp->snd_una,
		.unsent = tp->write_seq - tp->snd_nxt,
	};
	if (skoff_in(sk->sk_state, SKOFF_FIN_RCVD) && lengths->receive)
		lengths->receive--;
	if (fin && lengths->unsent)
		lengths->unsent--;
	else if (fin && lengths->unacked)
		lengths->unacked--;
	skb_rbtree_walk_from(skb) {
		if (!is_kept(skb))
			continue;
		lengths->segments++;
		lengths->out_of_order += skb->len;
	}
}

/* Copy what lies in the skb from sequence number `next` on; the copied length or an error. */
static int copy_skb(const struct sk_buff *skb, u32 next, void __user *to, u32 room)
{
	u32 offset = after(next, TCP_SKB_CB(skb)->seq) ? next - TCP_SKB_CB(skb)->seq : 0;
	u32 length = offset < skb->len ? skb->len - offset : 0;
	struct iov_iter iter;
	struct iovec iov = { .iov_base = to, .iov_len = length };

	if (!length)
		return 0;
	if (length > room)
		return -EIO;
	if (!access_ok(to, length))
		return -EFAULT;
	iov_iter_init(&iter, ITER_DEST, &iov, 1, length);
	return skb_copy_datagram_iter(skb, offset, &iter, length) ?: (int)length;
}

/* All bytes of one queue must have been there: what is not in an skb was never ours. */
struct cursor {
	void __user *to;
	u32 left, next;
	int err;
};

static void copy_next(struct cursor *at, const struct sk_buff *skb)
{
	int copied = at->err ?: copy_skb(skb, at->next, at->to, at->left);

	if (copied < 0) {
		at->err = copied;
		return;
	}
	at->to += copied;
	at->left -= copied;
	at->next += copied;
}

static int copy_receive(struct sock *sk, u32 length, void __user *to)
{
	struct cursor at = { .to = to, .left = length, .next = tcp_sk(sk)->copied_seq };
	struct sk_buff *skb;

	skb_queue_walk(&sk->sk_receive_queue, skb)
		copy_next(&at, skb);
	return at.err ?: at.left ? -EIO : 0;
}

static int copy_send(struct sock *sk, const struct skoff_lengths *lengths, void __user *to)
{
	struct cursor at = { .to = to, .left = lengths->unacked, .next = tcp_sk(sk)->snd_una };
	struct sk_buff *skb = tcp_rtx_queue_head(sk);

	skb_rbtree_walk_from(skb)
		copy_next(&at, skb);
	if (at.err || at.left)
		return at.err ?: -EIO;
	at.left = lengths->unsent;
	skb_queue_walk(&sk->sk_write_queue, skb)
		copy_next(&at, skb);
	return at.err ?: at.left ? -EIO : 0;
}

static int copy_segments(struct sock *sk, const struct skoff_lengths *lengths,
			 struct skoff_segment __user *headers, void __user *to)
{
	struct sk_buff *skb = skb_rb_first(&tcp_sk(sk)->out_of_order_queue);
	struct cursor at = { .to = to, .left = lengths->out_of_order };

	skb_rbtree_walk_from(skb) {
		struct skoff_segment header = {
			.sequence = TCP_SKB_CB(skb)->seq, .length = skb->len,
		};

		if (!is_kept(skb))
			continue;
		if (copy_to_user(headers++, &header, sizeof(header)))
			return -EFAULT;
		at.next = header.sequence;
		copy_next(&at, skb);
	}
	return at.err;
}

int skoff_copy_queues(struct sock *sk, const struct skoff_lengths *lengths, void __user *to)
{
	struct skoff_segment __user *headers = to;
	int err;

	to += lengths->segments * sizeof(*headers);
	err = copy_receive(sk, lengths->receive, to);
	to += lengths->receive;
	err = err ?: copy_send(sk, lengths, to);
	to += lengths->unacked + lengths->unsent;
	return err ?: copy_segments(sk, lengths, headers, to);
}

/* A received segment as tcp_send_rcvq() makes one. */
static struct sk_buff *make_segment(struct sock *sk, u32 seq, const void __user *from, u32 length)
{
	struct sk_buff *skb = alloc_skb(length, sk->sk_allocation);

	if (!skb)
		return ERR_PTR(-ENOMEM);
	if (!sk_rmem_schedule(sk, skb, skb->truesize)) {
		kfree_skb(skb);
		return ERR_PTR(-ENOBUFS);
	}
	if (length && copy_from_user(skb_put(skb, length), from, length)) {
		kfree_skb(skb);
		return ERR_PTR(-EFAULT);
	}
	memset(TCP_SKB_CB(skb), 0, sizeof(*TCP_SKB_CB(skb)));
	TCP_SKB_CB(skb)->seq = seq;
	TCP_SKB_CB(skb)->end_seq = seq + length;
	TCP_SKB_CB(skb)->ack_seq = tcp_sk(sk)->snd_una - 1;
	TCP_SKB_CB(skb)->tcp_flags = TCPHDR_ACK;
	return skb;
}

static void append(struct sock *sk, struct sk_buff *skb)
{
	__skb_queue_tail(&sk->sk_receive_queue, skb);
	skb_set_owner_r(skb, sk);
	WRITE_ONCE(tcp_sk(sk)->rcv_nxt, TCP_SKB_CB(skb)->end_seq);
}

int skoff_fill_receive(struct sock *sk, const void __user *from, u32 length)
{
	while (length) {
		u32 piece = min(length, SKOFF_PIECE);
		struct sk_buff *skb = make_segment(sk, tcp_sk(sk)->rcv_nxt, from, piece);

		if (IS_ERR(skb))
			return PTR_ERR(skb);
		append(sk, skb);
		from += piece;
		length -= piece;
	}
	return 0;
}

/* The peer's FIN, which the application has still to find behind the data. */
int skoff_fill_fin(struct sock *sk)
{
	struct sk_buff *skb = make_segment(sk, tcp_sk(sk)->rcv_nxt, NULL, 0);

	if (IS_ERR(skb))
		return PTR_ERR(skb);
	TCP_SKB_CB(skb)->tcp_flags |= TCPHDR_FIN;
	TCP_SKB_CB(skb)->end_seq++;
	append(sk, skb);
	return 0;
}

/* To the send queue: as sent, with tp->repair_queue TCP_SEND_QUEUE, else as unsent. */
int skoff_fill_send(struct sock *sk, const void __user *from, u32 length)
{
	struct iovec iov = { .iov_base = (void __user *)from, .iov_len = length };
	struct msghdr message = { .msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL };
	int sent;

	if (!length)
		return 0;
	if (!access_ok(from, length))
		return -EFAULT;
	iov_iter_init(&message.msg_iter, ITER_SOURCE, &iov, 1, length);
	sent = tcp_sendmsg_locked(sk, &message, length);
	if (sent < 0)
		return sent == -EAGAIN ? -ENOBUFS : sent;
	return sent == length ? 0 : -ENOBUFS;
}

static void insert_last(struct sock *sk, struct sk_buff *skb)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct rb_node *last = rb_last(&tp->out_of_order_queue);

	rb_link_node(&skb->rbnode, last, last ? &last->rb_right : &tp->out_of_order_queue.rb_node);
	rb_insert_color(&skb->rbnode, &tp->out_of_order_queue);
	tp->ooo_last_skb = skb;
	skb_set_owner_r(skb, sk);
}

/* The peer hears of the last (up to four) blocks again (RFC 2018 section 4). */
static void remember_block(struct tcp_sock *tp, u32 seq, u32 end_seq)
{
	struct tcp_sack_block *blocks = tp->selective_acks;
	u8 count = tp->rx_opt.num_sacks;

	if (!tcp_is_sack(tp))
		return;
	if (count && blocks[0].end_seq == seq) {
		blocks[0].end_seq = end_seq;
		return;
	}
	memmove(&blocks[1], &blocks[0], 3 * sizeof(blocks[0]));
	blocks[0].start_seq = seq;
	blocks[0].end_seq = end_seq;
	tp->rx_opt.num_sacks = min(count + 1, 4);
}

int skoff_fill_segments(struct sock *sk, const void __user *headers,
			const void __user *from, u32 count, u32 length)
{
	const struct skoff_segment __user *entry = headers;
	struct tcp_sock *tp = tcp_sk(sk);
	u32 next = tp->rcv_nxt + 1;

	for (; count; count--, entry++) {
		struct skoff_segment header;
		struct sk_buff *skb;

		if (copy_from_user(&header, entry, sizeof(header)))
			return -EFAULT;
		if (!header.length || header.length > length || before(header.sequence, next) ||
		    after(header.sequence + header.length, tp->rcv_nxt + tp->rcv_wnd))
			return -EINVAL;
		skb = make_segment(sk, header.sequence, from, header.length);
		if (IS_ERR(skb))
			return PTR_ERR(skb);
		insert_last(sk, skb);
		next = header.sequence + header.length;
		remember_block(tp, header.sequence, next);
		from += header.length;
		length -= header.length;
	}
	return length ? -EINVAL : 0;
}
