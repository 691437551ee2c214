/* SPDX-License-Identifier: GPL-2.0-only */
/* The only place that knows what differs between kernel versions. */
#ifndef _OMSS_COMPAT_H
#define _OMSS_COMPAT_H

#include <linux/file.h>
#include <linux/fs.h>
#include <linux/net.h>
#include <linux/uio.h>
#include <linux/version.h>
#include <net/sock.h>

#define OMSS_KERNEL	LINUX_VERSION_CODE

/*
 * Hand pages to a socket. Since 6.5 sendmsg() does it, with datagrams too. Before,
 * TCP has sendpage(). UDP's is of no use: it takes no UDP_SEGMENT, IPv6 has none,
 * and in the 6.1 of today it copies as sendmsg() does.
 */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 5, 0)
#define OMSS_FEATURES	OMSS_SHARED_DATAGRAMS

static inline int omss_send_pages(struct socket *sock, struct msghdr *msg)
{
	msg->msg_flags |= MSG_SPLICE_PAGES;
	return sock_sendmsg(sock, msg);
}
#else
#define OMSS_FEATURES	0

static inline int omss_send_pages(struct socket *sock, struct msghdr *msg)
{
	const struct bio_vec *frag = msg->msg_iter.bvec;
	unsigned long left = msg->msg_iter.nr_segs;
	int sent = 0, err, flags;

	for (; left; left--, frag++) {
		flags = msg->msg_flags;
		if (left > 1)
			flags |= MSG_MORE | MSG_SENDPAGE_NOTLAST;
		err = kernel_sendpage(sock, frag->bv_page, frag->bv_offset, frag->bv_len, flags);
		if (err < 0)
			return sent ?: err;
		sent += err;
		if (err < frag->bv_len)
			break;
	}
	return sent;
}
#endif

/* A reference to the socket's file unless that is being closed. Under RCU. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
static inline struct file *omss_get_file(struct socket *sock)
{
	return get_file_active(&sock->file);
}
#else
static inline struct file *omss_get_file(struct socket *sock)
{
	struct file *file = READ_ONCE(sock->file);

	return file && get_file_rcu(file) ? file : NULL;
}
#endif

/* A new descriptor of the caller's for a file, close-on-exec. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 8, 0)
static inline int omss_receive_fd(struct file *file)
{
	return receive_fd(file, NULL, O_CLOEXEC);
}
#else
static inline int omss_receive_fd(struct file *file)
{
	return receive_fd(file, O_CLOEXEC);
}
#endif

#endif
